# A server with an NVIDIA GPU: docker build -t mnemodyn . && docker run --gpus all -v $PWD:/data mnemodyn embed /data/scans -o /data/e.csv -c NAME/MODEL --device cuda
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1 HF_HOME=/data/.huggingface MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /opt/mnemodyn

# The wheel of PyPI for Linux brings CUDA and Triton with it; the driver is the host's. Triton compiles its launcher.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY constraints.txt .
RUN pip install --constraint constraints.txt torch

COPY pyproject.toml README.md LICENSE ./
COPY mnemodyn mnemodyn
COPY brainmarks brainmarks
RUN pip install --constraint constraints.txt ".[parquet]"

# Whoever runs it owns what it writes: docker run --user $(id -u):$(id -g)
WORKDIR /data
ENTRYPOINT ["mnemodyn"]
CMD ["--help"]
