//! Attention variants, pretrained architectures and surgery on them.
