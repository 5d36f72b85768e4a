# The control plane: control, liveness and fencing workers, intake, beat, Flower. What runs on a node is installed on the
# node, beside its libvirt; this image has neither libvirt nor a compiler.
FROM python:3.12-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python -m venv /opt/vmherd
COPY requirements-control.lock ./
RUN /opt/vmherd/bin/pip install --require-hashes -r requirements-control.lock
COPY . ./
RUN /opt/vmherd/bin/pip install --no-deps .

FROM python:3.12-slim-bookworm
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin vmherd
COPY --from=build /opt/vmherd /opt/vmherd
ENV PATH=/opt/vmherd/bin:$PATH PYTHONUNBUFFERED=1
# The only place to write: beat keeps its schedule here.
WORKDIR /tmp
USER 10001:10001
ENTRYPOINT ["vmherd"]
CMD ["--help"]
