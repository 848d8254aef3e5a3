// Files that shrink while they are mapped: an error instead of SIGBUS.
//
// A read beyond the end of a mapped file raises SIGBUS. The handler installed here puts a page of zeros under the
// address, if it lies in a watched range, and raises its flag; the step that was running finishes with wrong numbers,
// which its caller throws away. Faults elsewhere go to the handler that was there before.
#pragma once

#include <atomic>
#include <cstddef>

namespace everybit::engine {

enum class Watch : int { intact, lost, ended };

// Watches [data, data + bytes) from now on; installs the handler at the first call. -> its state, which turns `lost`
// with the first page that is. Store `ended` before the range is unmapped: its addresses may come to belong to somebody
// else.
std::atomic<Watch>* watch_mapping(const void* data, std::size_t bytes);

}  // namespace everybit::engine
