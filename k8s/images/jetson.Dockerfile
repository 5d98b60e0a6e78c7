# raymoe's image for Jetson boards: on an image of JetPack's release that has Python 3.11 to 3.13 and PyTorch 2.9 or newer
# with CUDA, for PyTorch's own wheels don't know the GPUs of all of these boards. From the repository's root, on arm64:
#
#   tag: raymoe:VERSION-jetson   docker build -f k8s/images/jetson.Dockerfile -t raymoe:0.1.0-jetson --build-arg BASE=IMAGE:TAG .

ARG BASE

FROM python:3.11.14-slim-bookworm AS wheel

WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY raymoe raymoe
COPY predictor predictor
COPY deployments deployments
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .


# hadolint ignore=DL3006
FROM ${BASE} AS build

# hadolint ignore=DL3002
USER 0
RUN python3 -c "import sys, torch; assert sys.version_info >= (3, 11), sys.version; assert torch.version.cuda, 'no CUDA'"
# releases of packages are those of the base image's system
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv --system-site-packages /opt/raymoe
ENV PATH=/opt/raymoe/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
COPY constraints.txt ./
COPY --from=wheel /wheels /wheels
# the image's own torch and numpy stay: they were built for each other
RUN grep -vE '^(torch|numpy)==' constraints.txt > jetson.txt \
    && python -c "import torch, numpy; print(f'torch=={torch.__version__}\nnumpy=={numpy.__version__}')" >> jetson.txt \
    && pip install -c jetson.txt /wheels/*.whl \
    && python -P -m raymoe.kernels.building


# hadolint ignore=DL3006
FROM ${BASE}

USER 0
# releases of packages are those of the base image's system
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && (id -u 1000 > /dev/null 2>&1 || useradd --uid 1000 --create-home raymoe)
COPY --from=build /opt/raymoe /opt/raymoe
ENV PATH=/opt/raymoe/bin:$PATH HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 HOME=/tmp
USER 1000:1000
WORKDIR /tmp
CMD ["raymoe", "--help"]
