// From text files to token shards: what `headwater prepare` does.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/files.h"
#include "train/token_shard.h"

namespace headwater {

/// What counts as one document. A line is blank if it is empty or only white space.
enum class DocumentSplit {
  file,        ///< a whole file
  blank_line,  ///< a run of lines that are not blank, without its last line break
  line,        ///< a line that is not blank, without its line break
};

/// Reads "file", "blank_line" or "line". Throws an input error for anything else.
DocumentSplit parse_document_split(const std::string& name);

struct PrepareOptions {
  std::vector<Path> files;
  /// The folder for train.bin and validation.bin; made if missing.
  Path out;
  /// Share of the text's bytes to hold out, 0 <= fraction < 1. With 0 there is no validation.bin.
  double validation_fraction = 0.05;
  DocumentSplit split = DocumentSplit::file;
};

struct PrepareReport {
  ShardInfo train;
  std::optional<ShardInfo> validation;
};

/// Writes the texts, in the order given, as byte tokens, each document followed by an end of document, to
/// OUT/train.bin and, its last part, to OUT/validation.bin. Documents stay whole where that keeps the
/// held-out share within half of what was asked for; else the cut goes through the document, and its two
/// parts become two. Any bytes will do, UTF-8 or not. Files may be larger than memory; they are read twice.
///
/// Throws an input error for a missing, unreadable or empty text, a folder in place of a file, a fraction
/// outside [0, 1), a text too small to be cut, or an OUT/validation.bin that would stay behind from an
/// earlier time; a machine error where the disk fails. A shard that was there before is replaced when the new
/// one is whole.
PrepareReport prepare(const PrepareOptions& options);

}  // namespace headwater
