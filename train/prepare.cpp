#include "train/prepare.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string_view>
#include <utility>

#include "core/error.h"
#include "train/tokenizer.h"

namespace headwater {
namespace {

bool is_blank(std::string_view line) {
  return line.find_first_not_of(" \t\r\n\v\f") == std::string_view::npos;
}

/// The line at the beginning of `text`, with its line break if it has one.
std::string_view first_line(std::string_view text) {
  return text.substr(0, std::min(text.size() - 1, text.find('\n')) + 1);
}

std::string_view without_line_break(std::string_view line) {
  if (line.ends_with('\n')) line.remove_suffix(1);
  if (line.ends_with('\r')) line.remove_suffix(1);
  return line;
}

/// Takes the next document off `text`; empty if there is none left.
std::string_view take_document(std::string_view& text, DocumentSplit split) {
  if (split == DocumentSplit::file) return std::exchange(text, {});
  while (!text.empty() && is_blank(first_line(text))) text.remove_prefix(first_line(text).size());
  const std::string_view rest = text;
  while (!text.empty() && !is_blank(first_line(text))) {
    text.remove_prefix(first_line(text).size());
    if (split == DocumentSplit::line) break;
  }
  return without_line_break(rest.substr(0, rest.size() - text.size()));
}

/// Calls visit(document) for every document, in order. One file is mapped at a time.
template <class Visit>
void for_each_document(const PrepareOptions& options, const Visit& visit) {
  for (const Path& path : options.files) {
    const std::shared_ptr<const MappedFile> file = MappedFile::open(path);
    std::string_view text(reinterpret_cast<const char*>(file->data()), file->size());
    for (std::string_view document = take_document(text, options.split); !document.empty();
         document = take_document(text, options.split)) {
      visit(document);
    }
  }
}

int64_t count_text_bytes(const PrepareOptions& options) {
  int64_t n_bytes = 0;
  for_each_document(options,
                    [&](std::string_view document) { n_bytes += static_cast<int64_t>(document.size()); });
  return n_bytes;
}

void append_document(TokenShardWriter& writer, std::string_view document) {
  constexpr size_t piece_size = 1 << 20;
  if (document.empty()) return;
  for (size_t begin = 0; begin < document.size(); begin += piece_size) {
    const std::vector<int32_t> tokens = ByteTokenizer::encode(document.substr(begin, piece_size));
    writer.append(tokens, static_cast<int64_t>(tokens.size()));
  }
  writer.append(std::array{ByteTokenizer::end_of_document}, 0);
  writer.end_document();
}

/// Where the text is divided, in bytes from its beginning.
struct Cut {
  int64_t n_text_bytes;
  int64_t n_held_out;
  int64_t place;

  /// Moves the cut out of the document [begin, end) to the nearer of its two ends, if the share held out
  /// changes by at most half and neither part of the text becomes empty.
  void spare_document(int64_t begin, int64_t end) {
    if (place <= begin || place >= end) return;
    const int64_t nearer = place - begin <= end - place ? begin : end;
    const bool is_near = 2 * std::abs(nearer - place) <= n_held_out;
    if (is_near && nearer > 0 && nearer < n_text_bytes) place = nearer;
  }
};

/// Checks the options against each other and against the text, and finds where to divide it.
Cut find_cut(const PrepareOptions& options) {
  const double fraction = options.validation_fraction;
  require(!options.files.empty(), "prepare: no text was given; name at least one file");
  require(fraction >= 0 && fraction < 1,
          "prepare: a validation fraction of {}; it must be at least 0 and below 1", fraction);
  const int64_t n_text_bytes = count_text_bytes(options);
  require(n_text_bytes > 0, "{}: there is no text{}", options.files.front().string(),
          options.files.size() == 1 ? "" : ", nor in the files after it");
  const int64_t n_held_out = std::llround(static_cast<double>(n_text_bytes) * fraction);
  require(fraction == 0 || (n_held_out > 0 && n_held_out < n_text_bytes),
          "{}: a text of {} cannot be divided with a validation fraction of {}; give more text, or a "
          "fraction of 0",
          options.files.front().string(), bytes_text(static_cast<uint64_t>(n_text_bytes)), fraction);
  return {.n_text_bytes = n_text_bytes, .n_held_out = n_held_out, .place = n_text_bytes - n_held_out};
}

}  // namespace

DocumentSplit parse_document_split(const std::string& name) {
  if (name == "file") return DocumentSplit::file;
  if (name == "blank_line") return DocumentSplit::blank_line;
  if (name == "line") return DocumentSplit::line;
  throw_input_error("'{}' is no way to split text into documents; known: file, blank_line, line", name);
}

PrepareReport prepare(const PrepareOptions& options) {
  Cut cut = find_cut(options);
  const Path validation_path = options.out / "validation.bin";
  const bool holds_out = cut.n_held_out > 0;
  require(holds_out || !exists(validation_path),
          "{}: is from an earlier prepare; with a validation fraction of 0 it would stay beside a train.bin "
          "that it does not belong to; remove it or choose another folder",
          validation_path.string());
  make_directories(options.out);

  TokenShardWriter train(options.out / "train.bin", ByteTokenizer::vocab_size, ByteTokenizer::hash());
  std::optional<TokenShardWriter> validation;
  if (holds_out) validation.emplace(validation_path, ByteTokenizer::vocab_size, ByteTokenizer::hash());
  int64_t place = 0;
  for_each_document(options, [&](std::string_view document) {
    const int64_t size = static_cast<int64_t>(document.size());
    cut.spare_document(place, place + size);
    const size_t n_train = static_cast<size_t>(std::clamp<int64_t>(cut.place - place, 0, size));
    append_document(train, document.substr(0, n_train));
    if (holds_out) append_document(*validation, document.substr(n_train));
    place += size;
  });
  PrepareReport report;
  report.train = train.finish();
  if (holds_out) report.validation = validation->finish();
  return report;
}

}  // namespace headwater
