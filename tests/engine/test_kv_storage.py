"""KV blocks leave one storage and enter another."""

import torch

from rempart_engine.kv_storage import KVStorage, PoolShape, block_bytes

SHAPES = (
    PoolShape("records", num_layers=3, block_shape=(64, 20), dtype=torch.bfloat16),
    PoolShape("pages", num_layers=2, block_shape=(1152,), dtype=torch.uint8),
)


def test_exported_blocks_arrive_in_all_pools_under_other_ids_and_touch_no_others() -> None:
    source, target = KVStorage(SHAPES, 5), KVStorage(SHAPES, 4)
    for shape in SHAPES:
        for layer in range(shape.num_layers):
            pool = source.layer(shape.name, layer)
            pool.copy_(torch.randint(1, 100, pool.shape))
    target.import_blocks([2, 0], source.export_blocks([4, 1]))
    for shape in SHAPES:
        for layer in range(shape.num_layers):
            sent, received = source.layer(shape.name, layer), target.layer(shape.name, layer)
            assert torch.equal(received[[2, 0]], sent[[4, 1]])
            assert not received[[1, 3]].any()


def test_a_block_counts_all_pools_over_their_layers() -> None:
    storage = KVStorage(SHAPES, 1)
    pools = [storage.layer(shape.name, layer) for shape in SHAPES for layer in range(shape.num_layers)]
    assert block_bytes(SHAPES) == sum(pool.numel() * pool.itemsize for pool in pools)
