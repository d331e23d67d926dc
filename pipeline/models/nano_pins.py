"""SHA-256 and size in bytes of the files of phi4-nano. Written by scripts/pin_nano.py."""

PINS: dict[str, tuple[str, int]] = {
    "config.json": (
        "17d94d558939c0fe0d398e108c2e9434d36438b420ad3044443258008bcacee3",
        1_785,
    ),
    "generation_config.json": (
        "d26cb47a9e7beeb646db286c07ba1ec53c277017e9753050d1953f7ec0929d0d",
        91,
    ),
    "model.safetensors": (
        "53d126a0626d90fcbe5b757496a02e4f5feca33eeb5c7a675681710f28b62699",
        8_308_272,
    ),
    "speech-lora/adapter_config.json": (
        "7f39e7d4336dfa507b451465868987441479affeb2d4c00324cdc06532aa0432",
        207,
    ),
    "speech-lora/adapter_model.safetensors": (
        "dd66ca17a4ac5de7d59e33e0ccd65ead9a6383156626e6ecd017766c5d90cfa6",
        544_312,
    ),
    "tokenizer.json": (
        "a083be8fc7e693951e7b19c2ea26c5651b28d018c271ea0644aafb5fde1bdea0",
        51_280,
    ),
    "vision-lora/adapter_config.json": (
        "3c059e9940244306d7bf9e20f8041922e32182db7bf55532e13abbb6fa5d6278",
        207,
    ),
    "vision-lora/adapter_model.safetensors": (
        "891c5c054bd810ce8f29f4081582664b088611961112dcf6fb4967a5d644cd20",
        364_080,
    ),
}
