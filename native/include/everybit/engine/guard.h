// Files that shrink while they are mapped: an error instead of SIGBUS.
//
// A read beyond the end of a mapped file raises SIGBUS. The handler installed here puts a page of zeros under the
// address, if it lies in a watched range, and raises its flag; the step that was running finishes with wrong numbers,
// which its caller throws away. Faults elsewhere go to the handler that was there before.
#pragma once

#include <atomic>
#include <cstddef>

namespace everybit::engine {

// Watches [data, data + bytes) from now on; installs the handler at the first call. -> a flag that turns true when a
// page of the range was lost, and stays so. Ranges are never forgotten: a mapped overlay lives as long as its program,
// and an address that is no longer mapped cannot raise SIGBUS.
const std::atomic<bool>* watch_mapping(const void* data, std::size_t bytes);

}  // namespace everybit::engine
