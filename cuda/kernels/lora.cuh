// The ranks of a layer's LoRAs. The layer's output rows may have parts with ranks of their own (operands.py, LoRASizes).
#pragma once
#include "common.cuh"

// A part's ranks, and where they are.
struct LoraPart {
  int rank;         // a multiple of 8
  int first_rank;   // ranks of the parts before it
  int first_block;  // blocks of ranks of the parts before it; each part begins with a new block
  int first_row;    // output rows of the parts before it

  DEVICE int blocks() const { return (rank + 31) / 32; }
};

struct LoraRanks {
  u64 eighths;    // byte p is an eighth of part p's ranks; with one part, the whole number is
  int parts;
  int part_rows;  // output rows of each part but the last, which has the rest

  DEVICE LoraPart part(int index) const {
    LoraPart found{0, 0, 0, index * part_rows};
    for (int p = 0; p < index; p++) {
      const int rank = rank_of(p);
      found.first_rank += rank, found.first_block += (rank + 31) / 32;
    }
    found.rank = rank_of(index);
    return found;
  }

  // The part of a tile's output rows. Tiles have rows of one part only.
  DEVICE LoraPart part_of_row(int row) const { return part(parts > 1 ? min(row / part_rows, parts - 1) : 0); }

private:
  DEVICE int rank_of(int part) const { return 8 * (int)(parts > 1 ? eighths >> (8 * part) & 255 : eighths); }
};
