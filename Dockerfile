# The server with the agents that ship with it. Needs nothing but the base image and a Python package index:
#   docker build -t perdure:dev .
# Your own agents: a Dockerfile that begins with this image and installs your package into /opt/perdure.

# Give the digest, too, where images are built for production: --build-arg PYTHON=python:3.13.9-slim-trixie@sha256:…
ARG PYTHON=python:3.13.9-slim-trixie

FROM ${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
# The dependencies first, by their exact versions: this layer is made again only when these two files change.
COPY constraints.txt pyproject.toml ./
RUN python -m venv /opt/perdure \
 && python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; extras = p['optional-dependencies']; print(*p['dependencies'], *extras['service'], *extras['agents'], *extras['s3'], sep='\n')" > requirements.txt \
 && /opt/perdure/bin/pip install -c constraints.txt -r requirements.txt
# Then the wheel, made by the same build tool as everywhere.
COPY README.md CHANGELOG.md LICENSE ./
COPY protos protos
COPY service service
COPY clients clients
RUN python -m venv /tool \
 && /tool/bin/pip install -c constraints.txt hatchling \
 && /tool/bin/python -m hatchling build -t wheel -d dist \
 && /opt/perdure/bin/pip install --no-deps dist/*.whl \
 && /opt/perdure/bin/pip check

FROM ${PYTHON}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="perdure" \
      org.opencontainers.image.description="Durable agent runs: a gRPC service that hosts DBOS workflows on CockroachDB or PostgreSQL" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/perdure /opt/perdure
# Nothing is written but to /tmp, so the root file system may be read-only. Output is not held back in a buffer.
ENV PATH=/opt/perdure/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# A number, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /tmp
EXPOSE 50051 50052 9464
# SIGTERM drains (PERDURE_DRAIN_TIMEOUT); give it longer than that to stop.
STOPSIGNAL SIGTERM
ENTRYPOINT ["perdure-server"]
CMD ["serve"]
