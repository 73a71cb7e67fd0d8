"""The math: one calling convention, several backends."""
