//! Every operation on random shapes against the CPU's.
