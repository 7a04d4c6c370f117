# `attn` in a container. docs/Installation.md says what of this file has been tried: its commands, not an image as a whole.
#
#   docker build -t attn .                                     for the CPU
#   docker build -t attn --build-arg KIND=cuda .               with CUDA, to be run with `--gpus all`
#   docker run --rm attn doctor
#   docker run --rm -v "$PWD/runs:/attn/runs" -v "$HOME/.cache/huggingface:/hf" attn finetune
#
# The build needs a network: Debian, rustup, crates.io, PyPI.

FROM debian:12-slim AS build
# cpu: LibTorch 1.3 GB; cuda: 4.6 GB. `auto` would find no GPU here, as none is there while an image is built. The name is not LIBTORCH:
# that variable means a LibTorch of one's own to scripts/setup_env.sh and to the build.
ARG KIND=cpu
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates curl g++ python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
ENV RUSTUP_HOME=/usr/local/rustup CARGO_HOME=/usr/local/cargo PATH=/usr/local/cargo/bin:$PATH
WORKDIR /attn
# Rust is the oldest that the workspace is for: `rust-version` of Cargo.toml.
COPY Cargo.toml ./
RUN curl --proto '=https' --tlsv1.2 -fsS https://sh.rustup.rs \
  | sh -s -- -y --no-modify-path --profile minimal \
      --default-toolchain "$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)"
# LibTorch, in a layer of its own: it changes with this script alone.
COPY scripts/setup_env.sh scripts/
RUN scripts/setup_env.sh "$KIND" && rm -rf ~/.cache
COPY . .
RUN cargo build --locked --release --package attn-cli

FROM debian:12-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates libgomp1 libstdc++6 \
 && rm -rf /var/lib/apt/lists/*
# The program finds LibTorch at ../../.libtorch from where it lies, and its bundled configs in the working folder.
WORKDIR /attn
COPY --from=build /attn/.venv .venv
# A link, which COPY would follow: what LibTorch links to lies beside it in .venv.
RUN ln -s "$(ls -d .venv/lib/python3.*/site-packages/torch)" .libtorch
COPY --from=build /attn/target/release/attn target/release/attn
COPY configs configs
COPY data data
COPY results/models results/models
COPY LICENSE-APACHE LICENSE-MIT THIRD_PARTY.md ./
ENV PATH=/attn/target/release:$PATH HF_HOME=/hf
ENTRYPOINT ["attn"]
CMD ["help"]
