"""config.json of a merged model, from the configs that models come with."""

from transformers import AutoConfig, Gemma3Config, Gemma3TextConfig, LlamaConfig

from halfbyte.export.model_files import merged_config
from halfbyte.models.spec import ModelSpec


def test_quantization_and_old_names_are_gone() -> None:
    config = LlamaConfig(num_hidden_layers=1).to_dict() | {
        "quantization_config": {"load_in_4bit": True},
        "torch_dtype": "float16",
        "architectures": ["LlamaForCausalLM"],
        "_name_or_path": "somewhere",
    }
    out = merged_config(config, "bfloat16")
    assert not out.keys() & {"quantization_config", "torch_dtype", "_name_or_path"}
    assert (out["dtype"], out["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
    assert config["torch_dtype"] == "float16"  # the source's own is not changed


def test_a_multimodal_models_text_model_stands_alone() -> None:
    text = Gemma3TextConfig(num_hidden_layers=3, hidden_size=64, vocab_size=300, sliding_window=16)
    whole = Gemma3Config(text_config=text).to_dict() | {"architectures": ["Gemma3ForConditionalGeneration"]}
    whole["eos_token_id"] = [1, 106]
    whole["text_config"].pop("eos_token_id", None)
    out = merged_config(whole, "float32")
    assert out["architectures"] == ["Gemma3ForCausalLM"]
    assert "vision_config" not in out
    assert out["eos_token_id"] == [1, 106]
    assert ModelSpec.from_config(out) == ModelSpec.from_config(whole)
    made = AutoConfig.for_model(**out)
    assert (made.model_type, made.hidden_size) == ("gemma3_text", 64)


def test_a_config_without_architectures_gets_its_own() -> None:
    config = LlamaConfig(num_hidden_layers=1).to_dict()
    config.pop("architectures", None)
    assert merged_config(config, "bfloat16")["architectures"] == ["LlamaForCausalLM"]
