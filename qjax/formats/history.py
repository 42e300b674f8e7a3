"""Keys of configs that say how a model was quantized, not how it is stored."""

from __future__ import annotations

# Of a layer that GPTQModel has calibrated.
CALIBRATION = (
    *("mse", "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "hyb_act"),
    *("act_group_aware", "fallback", "hessian", "gptaq", "foem", "smoother", "smooth"),
)
# Of AutoRound, which writes them into its own configs and into those of other methods.
AUTO_ROUND = (
    *("autoround_version", "provider", "iters", "nsamples", "seqlen", "lr", "minmax_lr", "amp"),
    *("batch_size", "dataset", "gradient_accumulate_steps", "low_gpu_mem_usage"),
    *("enable_quanted_input", "enable_minmax_tuning", "enable_norm_bias_tuning"),
    *("supported_types", "scale_dtype", "super_bits", "super_group_size", "quant_block_list"),
    *("to_quant_block_names", "block_name_to_quantize", "static_kv_dtype"),
    *("static_kv_granularity", "static_attention_dtype", "static_attention_granularity"),
)
# Of everybody who writes GPTQ's layout or AWQ's: transformers has the same keys for both.
HISTORY = (
    *CALIBRATION,
    *AUTO_ROUND,
    *("quant_method", "method", "meta", "model_file_base_name", "model_name_or_path"),
    *("modules_in_block_to_quantize", "version", "use_exllama", "exllama_config", "model_seqlen"),
    *("use_cuda_fp16", "max_input_length", "backend", "cache_block_outputs", "disable_exllama"),
    *("module_name_preceding_first_block", "pad_token_id", "tokenizer", "adapter", "desc_act"),
    *("lm_head", "sym", "pack_dtype", "is_marlin_format", "parallel_packing"),
    *("checkpoint_format", "format", "rotation", "data_type", "inside_layer_modules"),
    "modules_to_not_convert",
)
