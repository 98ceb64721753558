// A model in a folder: model.safetensors and config.json, in the Hugging Face Mamba-2 layout where that layout can
// express the model, and readable by Headwater in any case.
#pragma once

#include <memory>
#include <string>

#include "core/files.h"
#include "models/language_model.h"

namespace headwater {

/// The files of a model: names of the weights' and of the config's file.
inline constexpr const char* weights_file = "model.safetensors";
inline constexpr const char* model_config_file = "config.json";

/// Writes both files into `folder`. Tied weights are stored once.
void write_model(const Path& folder, const LanguageModel& model);

/// The config of the model in `folder`: Headwater's own record where there is one, else the Hugging Face keys of
/// `model_type` "mamba2". Throws an input error that names the file for anything else.
LanguageModelConfig read_model_config(const Path& folder);

/// Fills the model's parameters from `folder`, converting dtypes. `backbone.embedding.weight` is accepted for the
/// embedding. Throws one input error that lists every missing, unexpected and mis-shaped tensor.
void read_weights(const Path& folder, LanguageModel& model);

/// read_model_config, a model of this dtype on this device, read_weights.
std::unique_ptr<LanguageModel> read_model(const Path& folder, DType dtype = DType::f32, Device device = {});

}  // namespace headwater
