#!/bin/sh
# Starts Redis in compose.yaml: the control plane's password comes from the environment, the nodes' users stay as they
# are in the volume. The password itself is neither written to a file nor put on a command line.
set -eu

: "${VMHERD_REDIS_PASSWORD:?is not set}"
hash=$(printf %s "$VMHERD_REDIS_PASSWORD" | sha256sum | cut -d' ' -f1)
unset VMHERD_REDIS_PASSWORD

umask 077
touch /data/users.acl
{
    echo "user default on #$hash ~* &* +@all"
    grep -v '^user default ' /data/users.acl || true
} >/data/users.acl.new
mv /data/users.acl.new /data/users.acl

# Its folder is another here, and must be there when the file is read.
grep -v '^dir ' /etc/vmherd/redis.conf >/data/redis.conf
exec redis-server /data/redis.conf --dir /data --aclfile /data/users.acl --bind '*' '-::*'
