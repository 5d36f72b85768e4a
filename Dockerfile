# The control plane: API with console, control, liveness and fencing workers, intake, beat, Flower. What runs on a node is
# installed on the node, beside its libvirt; this image has neither libvirt nor a compiler.
FROM python:3.12-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# Where packages come from, if not from PyPI: docker build --build-arg PIP_FIND_LINKS=http://… --build-arg PIP_NO_INDEX=1
ARG PIP_INDEX_URL PIP_FIND_LINKS PIP_NO_INDEX
WORKDIR /src
RUN python -m venv /opt/vmherd
COPY requirements-control.lock ./
RUN /opt/vmherd/bin/pip install --require-hashes -r requirements-control.lock
COPY . ./
RUN /opt/vmherd/bin/pip install --no-deps .

FROM python:3.12-slim-bookworm
# By which the fencing workers and the API ask a host's BMC (docs/failover.md); they run on Debian's own Python.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends fence-agents ipmitool \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin vmherd \
    && install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/vmherd
COPY --from=build /opt/vmherd /opt/vmherd
ENV PATH=/opt/vmherd/bin:$PATH PYTHONUNBUFFERED=1
# What is not mounted is read-only (compose.yaml): /tmp, and /var/lib/vmherd for the API's certificate.
WORKDIR /tmp
USER 10001:10001
ENTRYPOINT ["vmherd"]
CMD ["--help"]
