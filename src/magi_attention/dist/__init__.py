"""Context parallelism: tokens of one sequence on many ranks."""
