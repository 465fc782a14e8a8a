"""Exchange: files of other systems: `galvatron` reads its profiles, `megatron` writes parallelisms by module."""
