//! What tch lacks of LibTorch, behind a safe interface.
