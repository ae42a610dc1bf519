"""Memory of batches: stacked without copies, used again only when nobody holds it."""

import numpy as np
import torch

from musubi_tuner.dataset.frame_store import BlockPool
from musubi_tuner.dataset.rows import Rows, stack


def fill(rows: Rows, role: str, count: int, shape: tuple[int, ...] = (3, 4), start: int = 0) -> list[torch.Tensor]:
    tensors = [rows.take(role, shape, torch.float32) for _ in range(count)]
    for number, tensor in enumerate(tensors, start):
        tensor.fill_(number)
    return tensors


def test_rows_of_a_role_are_stacked_without_a_copy():
    tensors = fill(Rows(3, BlockPool()), "video", 3)
    stacked = stack(tensors)
    assert stacked.shape == (3, 3, 4)
    assert stacked.is_contiguous()
    assert stacked.data_ptr() == tensors[0].data_ptr()
    assert torch.equal(stacked, torch.arange(3.0)[:, None, None].expand(3, 3, 4))


def test_roles_and_shapes_do_not_mix():
    rows = Rows(2, BlockPool())
    mixed = [(rows.take("video", (2, 2), torch.float32), rows.take("reference", (2, 2), torch.float32)) for _ in "ab"]
    for number, (video, reference) in enumerate(mixed):
        video.fill_(number)
        reference.fill_(10 + number)
    assert stack([video for video, _ in mixed])[:, 0, 0].tolist() == [0, 1]
    assert stack([reference for _, reference in mixed])[:, 0, 0].tolist() == [10, 11]


def test_what_is_no_run_is_copied():
    tensors = fill(Rows(3, BlockPool()), "video", 3)
    backwards = stack(tensors[::-1])
    assert backwards.data_ptr() != tensors[0].data_ptr()
    assert backwards[:, 0, 0].tolist() == [2, 1, 0]
    assert stack([tensors[0], tensors[2]])[:, 0, 0].tolist() == [0, 2]
    turned = [torch.arange(6.0).view(2, 3).T for _ in range(2)]
    assert torch.equal(stack(turned), torch.stack(turned))


def test_more_than_announced_get_a_block_of_their_own():
    tensors = fill(Rows(2, BlockPool()), "video", 3)
    assert stack(tensors)[:, 0, 0].tolist() == [0, 1, 2]


def test_neighbours_in_memory_of_different_owners_are_copied():
    whole = np.zeros(8, np.float32)
    left, right = torch.from_numpy(whole[:4]), torch.from_numpy(whole[4:])  # two storages, one address after the other
    stacked = stack([left, right])
    stacked.fill_(1)
    assert not whole.any()


def test_memory_in_use_is_not_handed_out_again():
    pool = BlockPool()
    held = stack(fill(Rows(2, pool), "video", 2, start=5))
    other = stack(fill(Rows(2, pool), "video", 2, start=7))
    assert held[:, 0, 0].tolist() == [5, 6]
    assert other[:, 0, 0].tolist() == [7, 8]
    part, address = held[1], held.data_ptr()
    del held
    third = stack(fill(Rows(2, pool), "video", 2, start=9))
    assert part[0, 0] == 6
    assert third.data_ptr() != address
    del part, third, other
    assert Rows(2, pool).take("video", (3, 4), torch.float32).data_ptr() == address


def test_a_pool_keeps_no_more_than_it_may():
    pool = BlockPool(keep=100)
    first = pool.take((80,))
    address = first.__array_interface__["data"][0]
    second = pool.take((80,))  # beyond the limit: not kept
    del first, second
    assert pool.take((80,)).__array_interface__["data"][0] == address
