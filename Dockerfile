# An image that trains: docs/pods.md#kubernetes. For GPUs: --build-arg JAX_KIND=cuda13.
#   docker build -t REGISTRY/meanflow . && docker push REGISTRY/meanflow
FROM python:3.12-slim
ARG JAX_KIND=tpu
ENV JAX_KIND=$JAX_KIND PYTHONUNBUFFERED=1 LOG_DIR=gs://BUCKET/logs DATA_ROOT=gs://BUCKET/data
WORKDIR /meanflow
COPY . .
# LOG_DIR begins with gs://, so that install.sh adds what buckets need.
RUN bash install.sh
# exec form: SIGTERM reaches launch.sh, which has the run saved.
ENTRYPOINT ["bash", "scripts/launch.sh"]
CMD ["--help"]
