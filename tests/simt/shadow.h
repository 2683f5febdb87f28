// Race mode: every access of a launch is compared with those before it. Elsewhere these functions are empty.
//
// Accesses are ordered by __syncthreads and __syncwarp and by nothing else.
#pragma once

#include <cstddef>
#include <cstdint>

#include "machine.h"

namespace simt::shadow {

#if defined(SIMT_RACE)

constexpr size_t kSharedPadding = 4096;  // accesses just beyond shared memory are seen as such

void start_launch();
void start_block();
void barrier();
void sync_warp(uint32_t mask);  // of the current thread's warp

// By the current thread; `what` names the access.
void read(const void* p, size_t bytes, const char* what);
void write(const void* p, size_t bytes, const char* what);
void read_by_warp(const void* p, size_t bytes, const char* what);  // by every lane

void copy_issued(Copy&);
void copy_done(const Copy&);

#else

constexpr size_t kSharedPadding = 0;

inline void start_launch() {}
inline void start_block() {}
inline void barrier() {}
inline void sync_warp(uint32_t) {}
inline void read_by_warp(const void*, size_t, const char*) {}
inline void copy_issued(Copy&) {}
inline void copy_done(const Copy&) {}

#endif

}  // namespace simt::shadow
