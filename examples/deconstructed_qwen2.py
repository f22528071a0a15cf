"""A Qwen2 language model whose every other layer keeps a running mean instead of keys and values."""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from cenote.integrations.deconstructed_qwen2 import DeconstructedQwen2ForCausalLM

torch.manual_seed(0)
sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
host = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=4, num_hidden_layers=4)).eval()
ids = torch.randint(1, 100, (1, 40))

# The same weights in the same places, so that training goes on from the host's.
same = DeconstructedQwen2ForCausalLM.from_qwen2(host, "standard")
print(f"all standard, logits of the host: {torch.allclose(same(ids).logits, host(ids).logits, atol=1e-6)}")

for hybrid in (None, "even"):
    model = DeconstructedQwen2ForCausalLM.from_qwen2(host, "non_approximate", hybrid)
    with torch.no_grad():
        kept = [model(ids[:, :n]).past_key_values.num_bytes() for n in (10, 40)]
    print(f"{', '.join(model.config.variants)}: {kept[0]} bytes behind 10 tokens, {kept[1]} behind 40")

written = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
print(f"generated {written.shape[1] - ids.shape[1]} tokens")
with model.without_simple_layers():
    print(f"standard layers alone change the logits: {not torch.allclose(model(ids).logits, same(ids).logits)}")
