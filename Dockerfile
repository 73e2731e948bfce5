# docker build --tag mtptrain . && docker run --gpus all mtptrain +recipe=distill
# Not built yet: no container engine was at hand. The wheels of torch bring CUDA's libraries; the image gives the rest.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# Triton compiles a launcher with gcc and Python's headers when a kernel first runs. git names the commit of a run.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes gcc git libc6-dev make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /mtptrain
COPY . .
RUN make .venv/installed && rm -rf /root/.cache/pip

ENV PATH=/mtptrain/.venv/bin:$PATH OMP_NUM_THREADS=1
ENTRYPOINT ["mtptrain"]
CMD ["--help"]
