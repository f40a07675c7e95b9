# One container for every host: Docker, Kubernetes, Slurm with Apptainer, and Hugging Face Jobs. docs/clouds.md has the commands.
# The image holds no secret: give HF_TOKEN and MLflow's credentials at its start. .dockerignore lets in only the named folders.
ARG BASE=pytorch/pytorch:2.9.1-cuda12.8-cudnn9-runtime
FROM ${BASE}

# The image's Python is there for this suite alone, so pip may write into it.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
COPY scripts/requirements.txt /suite/scripts/requirements.txt
RUN python3 -m pip install --no-cache-dir --requirement /suite/scripts/requirements.txt

COPY . /suite
# A number instead of a name lets Kubernetes see that the user is not root.
RUN useradd --uid 10001 --create-home trainer && mkdir /suite/outputs /suite/.cache && chown trainer /suite/outputs /suite/.cache
ARG REVISION=unknown
RUN echo "$REVISION" > /suite/REVISION
USER 10001
WORKDIR /suite
# Runs and caches outlive the container: mount folders or volumes here.
ENV HF_HOME=/suite/.cache/huggingface MLFLOW_TRACKING_URI=sqlite:////suite/outputs/mlflow.db
VOLUME ["/suite/outputs", "/suite/.cache"]
# run_container.py becomes the first process, which gets SIGTERM, and passes SIGTERM to the training.
ENTRYPOINT ["python3", "/suite/scripts/run_container.py"]
