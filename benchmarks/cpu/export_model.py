"""The default model as a Hugging Face folder, for engines that do not read its GGUF file.

python benchmarks/cpu/export_model.py MODEL.gguf FOLDER
"""

import sys
from pathlib import Path


def export(gguf: Path, folder: Path) -> None:
    """Dequantise to bfloat16 safetensors with config and tokenizer, through transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = model.to(torch.bfloat16)
    # it is dequantised, but still says that it is not, and would refuse to be saved
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]))
