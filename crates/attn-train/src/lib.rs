//! Losses, optimizers, schedules, checkpoints.
