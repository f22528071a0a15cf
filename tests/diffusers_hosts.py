"""Small random transformers of diffusers, and inputs for them."""

import torch


def wan(**config):
    from diffusers import WanTransformer3DModel

    size = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16}
    inner = {"freq_dim": 16, "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 32}
    return _built(WanTransformer3DModel, {**size, **inner, **config})


def wan_image(**config):
    return wan(image_dim=16, added_kv_proj_dim=24, **config)


def hunyuan(**config):
    from diffusers import HunyuanVideoTransformer3DModel

    size = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4}
    text = {"text_embed_dim": 16, "pooled_projection_dim": 8, "num_refiner_layers": 1, "rope_axes_dim": (4, 4, 4)}
    return _built(HunyuanVideoTransformer3DModel, {**size, **text, "num_layers": 2, "num_single_layers": 2, **config})


def cogvideox(**config):
    from diffusers import CogVideoXTransformer3DModel

    size = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    sample = {"sample_width": 8, "sample_height": 8, "sample_frames": 9, "max_text_seq_length": 6}
    text = {"time_embed_dim": 8, "text_embed_dim": 16, "use_rotary_positional_embeddings": True}
    return _built(CogVideoXTransformer3DModel, {**size, **sample, **text, **config})


def flux(**config):
    from diffusers import FluxTransformer2DModel

    size = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "axes_dims_rope": (4, 4, 4)}
    text = {"joint_attention_dim": 16, "pooled_projection_dim": 8, "num_layers": 2, "num_single_layers": 2}
    return _built(FluxTransformer2DModel, {**size, **text, **config})


def _built(kind, config):
    torch.manual_seed(0)
    model = kind(**config).eval()
    with torch.no_grad():  # the modulation starts near zero in some, and attention would hardly matter
        for name, parameter in model.named_parameters():
            if "scale_shift" in name or "norm1" in name or name.endswith("norm.linear.weight"):
                parameter.normal_(std=0.5)
    return model


def wan_inputs(batch=2):
    return {
        "hidden_states": torch.randn(batch, 4, 3, 8, 12),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 5, 16),
    }


def wan_image_inputs(batch=2):
    return {
        **wan_inputs(batch),
        "encoder_hidden_states": torch.randn(batch, 512, 16),
        "encoder_hidden_states_image": torch.randn(batch, 7, 16),
    }


def hunyuan_inputs(batch=2, text=6, valid=(6, 3)):
    return {
        "hidden_states": torch.randn(batch, 4, 2, 8, 16),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, text, 16),
        "encoder_attention_mask": (torch.arange(text) < torch.tensor(valid)[:, None]).long(),
        "pooled_projections": torch.randn(batch, 8),
        "guidance": torch.full((batch,), 1000.0),
    }


def cogvideox_inputs(batch=2):
    angles = torch.randn(48, 6).repeat_interleave(2, dim=1)
    return {
        "hidden_states": torch.randn(batch, 3, 4, 8, 8),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 6, 16),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def flux_inputs(batch=2):
    places = torch.cartesian_prod(torch.arange(8), torch.arange(6))
    return {
        "hidden_states": torch.randn(batch, 48, 4),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": torch.randn(batch, 5, 16),
        "pooled_projections": torch.randn(batch, 8),
        "img_ids": torch.cat([torch.zeros(48, 1), places], dim=1),
        "txt_ids": torch.zeros(5, 3),
    }


HOSTS = {
    "wan": (wan, wan_inputs),
    "wan_image": (wan_image, wan_image_inputs),
    "hunyuan": (hunyuan, hunyuan_inputs),
    "cogvideox": (cogvideox, cogvideox_inputs),
    "flux": (flux, flux_inputs),
}
