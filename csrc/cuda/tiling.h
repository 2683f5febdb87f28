// The numbers that shape the launches. Results depend on those that say so, and never on the device.
#pragma once

#include "../problem.h"

namespace nystrom_ext::cuda {

// Tokens whose sum belongs to one slot: results depend on it, so it is a function of nothing.
constexpr int kChunk = 1024;
// Queries or keys that one block takes one tile after another; the m-sized operands are loaded once for them. Results
// of dconv depend on it.
constexpr int kRowChunk = 256;
// Shared memory that column tiles may take before they are loaded again for every row tile.
constexpr int kColumnMemory = 64 * 1024;
// Shared memory that the m x m matrices may take in the launch they share with the key pass, whose blocks then ask for
// as much: two and more fit one multiprocessor of sm_80, 90 and 100, one fits where it has 100 KB (sm_86, 89, 120).
constexpr int kCoreMemory = 72 * 1024;

constexpr Slots chunks(const Problem& p, const Tokens& t) { return {t, p.batch, kChunk}; }
constexpr Slots row_chunks(const Problem& p, const Tokens& t) { return {t, p.batch, kRowChunk}; }

}  // namespace nystrom_ext::cuda
