// Files that shrink while they are mapped: an error instead of SIGBUS.
//
// A read beyond the end of a mapped file raises SIGBUS. The handler installed here puts a page of zeros under the
// address, if it lies in a watched range, and raises a flag; the step that was running finishes with wrong numbers,
// which its caller throws away. Faults elsewhere go to the handler that was there before.
#pragma once

#include <cstddef>

namespace everybit::engine {

// Watches [data, data + bytes) from now on; installs the handler at the first call. Ranges are never forgotten: a
// mapped overlay lives as long as its program, and an address that is no longer mapped cannot raise SIGBUS.
void watch_mapping(const void* data, std::size_t bytes);

// Whether a watched page was lost since the last call.
bool take_lost_page();

}  // namespace everybit::engine
