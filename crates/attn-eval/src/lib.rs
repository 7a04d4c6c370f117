//! Metrics and statistics of models.
