//! Text, tokenizers and batches of token ids. Does not link LibTorch.
