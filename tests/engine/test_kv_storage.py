"""KV blocks leave one storage and enter another."""

import torch

from rempart_engine.kv_storage import KVShape, KVStorage

SHAPE = KVShape(num_layers=2, num_kv_heads=3, head_dim=8, dtype=torch.bfloat16)


def test_exported_blocks_arrive_under_other_ids_and_touch_no_others() -> None:
    source, target = KVStorage(SHAPE, 5), KVStorage(SHAPE, 4)
    for layer in range(SHAPE.num_layers):
        for pool in source.layer(layer):
            pool.copy_(torch.randn(pool.shape))
    target.import_blocks([2, 0], source.export_blocks([4, 1]))
    for layer in range(SHAPE.num_layers):
        for sent, received in zip(source.layer(layer), target.layer(layer), strict=True):
            assert torch.equal(received[[2, 0]], sent[[4, 1]])
            assert not received[[1, 3]].any()


def test_a_block_counts_its_keys_and_values_over_all_layers() -> None:
    pools = [pool for layer in range(SHAPE.num_layers) for pool in KVStorage(SHAPE, 1).layer(layer)]
    assert SHAPE.block_bytes == sum(pool.numel() * pool.itemsize for pool in pools)
