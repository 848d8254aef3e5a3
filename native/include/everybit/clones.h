// EVERYBIT_CLONES: compile a hot function once per instruction set and choose at load time.
//
// Only on x86-64 with glibc, where the loader resolves the choice (ifunc); elsewhere it is empty and the
// portable build is the only one. Results do not depend on the choice: the build switches floating-point
// contraction off (native/CMakeLists.txt), and every reduction has a fixed order in the source.
#pragma once

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(EVERYBIT_NO_CLONES)
#define EVERYBIT_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define EVERYBIT_CLONES
#endif
