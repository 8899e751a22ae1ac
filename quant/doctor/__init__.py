"""The doctor: a page of plain text on all that the 4-bit layers need of this machine, with a remedy for each problem."""
