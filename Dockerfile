# For a machine with an NVIDIA GPU; docs/using.md has the commands. Any image with a torch that pyproject.toml accepts will do.
ARG BASE=pytorch/pytorch:2.12.0-cuda13.0-cudnn9-runtime
FROM ${BASE}

# Triton compiles a little C for every kernel that it launches.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*

# The image's torch stays as it is: left alone, pip may put one for another CUDA in its place. The image is for nothing
# else, so packages go where its own are, which Debian's Python wants to be told.
COPY . /tmp/fastgrpo
RUN python -c "from importlib.metadata import version as v; print(*(n + '==' + v(n) for n in ('torch', 'torchvision', 'triton')), sep='\n')" \
        > /tmp/as-they-are.txt \
    && PIP_BREAK_SYSTEM_PACKAGES=1 pip install --no-cache-dir --constraint /tmp/as-they-are.txt /tmp/fastgrpo \
    && rm -rf /tmp/fastgrpo /tmp/as-they-are.txt

# Not root, and by default with the number that the first user of most machines has, so that runs belong to them.
ARG UID=1000
RUN { userdel --remove "$(id -un ${UID})" 2> /dev/null || true; } \
    && useradd --create-home --uid ${UID} fastgrpo \
    && install --directory --owner fastgrpo /work /work/runs /home/fastgrpo/.cache/huggingface
USER ${UID}
WORKDIR /work
ENTRYPOINT ["python", "-m", "fastgrpo.train"]
