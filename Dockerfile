# Not built so far: no Docker was at hand. The tag of BASE must have the torch of requirements.txt; see
# hub.docker.com/r/pytorch/pytorch/tags, and give another one with --build-arg BASE=...
#
#   docker build -t minimind .
#   docker run --gpus all --shm-size 8g -v "$PWD/out:/minimind/out" -v "$PWD/dataset:/data" minimind \
#       python trainer/train_pretrain.py --data_path /data/pretrain_hq.jsonl
ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
FROM ${BASE}
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PYTHONUNBUFFERED=1
# torch.compile needs a compiler
RUN apt-get update && apt-get install -y --no-install-recommends build-essential && rm -rf /var/lib/apt/lists/*
WORKDIR /minimind
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
RUN useradd --create-home trainer && mkdir out && chown -R trainer .
COPY --chown=trainer . .
USER trainer
VOLUME /minimind/out
CMD ["bash"]
