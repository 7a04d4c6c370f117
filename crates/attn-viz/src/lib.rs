//! Pictures from plain numbers and labels. Does not link LibTorch.
