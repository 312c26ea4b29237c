"""Attention over pages as Triton kernels: the tiles of torch_flash, one program of the GPU per row of tiles.

Milestone: M4. vLLM counterparts: vllm/attention/ops/triton_unified_attention.py,
vllm/attention/ops/triton_decode_attention.py and vllm/attention/ops/triton_reshape_and_cache_flash.py. Left out: exp2
instead of exp, tiles without a mask below the diagonal, tile sizes found by measuring, sliding windows, fp8 caches.
Sources: as in torch_flash.py; Tillet et al. 2019 (Triton).

**How to read a kernel.** The body is run by many programs at once, each with its own `tl.program_id`. What looks like a
tensor is a block of numbers in the registers of one program; `tl.load` and `tl.store` move a block from and to memory,
through a block of addresses, and a mask says which of them exist. `tl.constexpr` arguments are compiled in. A block has
a power of two of elements per axis, so a head of 80 is computed as 128 with 48 zeros (HEAD_PAD).

    torch_flash                                  here
    for each request, each tile of queries       one program: `chunk_kernel` (and one per KV head)
    for each tile of keys                        the loop of `attend_tiles`
    by_slot.index_select(slots)                  tl.load through the block table: nothing is gathered beforehand
    group_queries                                row r of a tile is new token r // GROUP, head r % GROUP
    merge_partials                               `merge_kernel`

There are two attention kernels, because a single query has only one row of tiles. `chunk_kernel` splits the queries of
a request over programs, and `single_kernel` splits its keys (split-KV, "Flash-Decoding"). Where a request is split
depends on that request alone, so its result does not depend on the rest of the batch.
"""

import triton
import triton.language as tl


@triton.jit
def attend_tiles(
    q: tl.tensor,  # [BLOCK_ROWS, HEAD_PAD] queries, in the dtype of the cache
    position: tl.tensor,  # [BLOCK_ROWS] where each query is in its sequence
    first_key: tl.tensor,
    last_key: tl.tensor,  # exclusive; no row may be without a key in the first tile
    table_ptr: tl.tensor,  # the request's row of the block table
    k_ptr: tl.tensor,  # slot 0 of this KV head
    v_ptr: tl.tensor,
    slot_stride: tl.tensor,
    scale: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
) -> tl.tensor:
    """Computes one row of tiles, as in torch_flash. Returns out [BLOCK_ROWS, HEAD_PAD] and lse [BLOCK_ROWS] in fp32."""
    dims = tl.arange(0, HEAD_PAD)  # [HEAD_PAD]
    row_max = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)  # m: largest score so far
    row_sum = tl.zeros([BLOCK_ROWS], tl.float32)  # l: sum of exp(score - m) so far
    acc = tl.zeros([BLOCK_ROWS, HEAD_PAD], tl.float32)  # O: sum of exp(score - m) * value so far
    for tile_start in range(first_key, last_key, BLOCK_KV):
        keys = tile_start + tl.arange(0, BLOCK_KV)  # [BLOCK_KV] positions
        exists = keys < last_key  # [BLOCK_KV]
        # Each key finds its own slot, so a tile may span pages of any size and start anywhere in them.
        blocks = tl.load(table_ptr + keys // BLOCK_SIZE, mask=exists, other=0)  # [BLOCK_KV]
        slots = blocks.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE  # [BLOCK_KV]; a cache has more than 2^31 numbers
        offsets = slots[:, None] * slot_stride + dims[None, :]  # [BLOCK_KV, HEAD_PAD]
        # Hidden slots are never read; `other` makes them 0. Behind the end of a sequence a slot may hold anything, and
        # a weight of 0 would not help against a NaN.
        mask = exists[:, None] & (dims[None, :] < HEAD_SIZE)  # [BLOCK_KV, HEAD_PAD]
        key = tl.load(k_ptr + offsets, mask=mask, other=0.0)  # [BLOCK_KV, HEAD_PAD]
        # "ieee": in fp32 a GPU would otherwise multiply in TF32, with 10 bits of mantissa.
        scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale  # [BLOCK_ROWS, BLOCK_KV] fp32
        visible = exists[None, :] & (keys[None, :] <= position[:, None])  # [BLOCK_ROWS, BLOCK_KV]
        scores = tl.where(visible, scores, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(scores, axis=1))  # [BLOCK_ROWS]; finite from the first tile on
        p = tl.exp(scores - new_max[:, None])  # [BLOCK_ROWS, BLOCK_KV]: 0 to 1, whatever the scores were
        correction = tl.exp(row_max - new_max)  # [BLOCK_ROWS]: 1 if the maximum stayed
        row_sum = row_sum * correction + tl.sum(p, axis=1)
        value = tl.load(v_ptr + offsets, mask=mask, other=0.0)  # [BLOCK_KV, HEAD_PAD]
        acc = acc * correction[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
        row_max = new_max
    return acc / row_sum[:, None], row_max + tl.log(row_sum)


@triton.jit
def chunk_kernel(
    out_ptr: tl.tensor,  # [num_tokens, num_heads, HEAD_SIZE], contiguous
    q_ptr: tl.tensor,  # [num_tokens, num_heads, HEAD_SIZE]
    k_ptr: tl.tensor,  # [num_slots, num_kv_heads, HEAD_SIZE], contiguous, like v
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,  # [num_reqs, table_stride]
    start_ptr: tl.tensor,  # [num_reqs + 1] query_start_loc
    lens_ptr: tl.tensor,  # [num_reqs] seq_lens
    tiles_ptr: tl.tensor,  # [num_tiles, 2] (request, its first new token in this tile)
    scale: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    out_token_stride: tl.tensor,
    table_stride: tl.tensor,
    slot_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
) -> None:
    """Attends with BLOCK_ROWS // GROUP new tokens of a request, for one KV head. Grid: (num_tiles, num_kv_heads).

    E.g. GROUP 3, BLOCK_ROWS 16: 5 tokens per tile. Rows 0, 1, 2 are heads 0, 1, 2 of the first token, and row 15 idles.
    """
    request = tl.load(tiles_ptr + 2 * tl.program_id(0))
    first = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)
    kv_head = tl.program_id(1)
    start = tl.load(start_ptr + request)
    q_len = tl.load(start_ptr + request + 1) - start
    seq_len = tl.load(lens_ptr + request)

    rows = tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    tokens = first + rows // GROUP  # [BLOCK_ROWS] counted from the request's first new token
    heads = kv_head * GROUP + rows % GROUP  # [BLOCK_ROWS]
    tokens_per_tile: tl.constexpr = BLOCK_ROWS // GROUP
    works = (rows < tokens_per_tile * GROUP) & (tokens < q_len)  # [BLOCK_ROWS]
    dims = tl.arange(0, HEAD_PAD)  # [HEAD_PAD]
    mask = works[:, None] & (dims[None, :] < HEAD_SIZE)  # [BLOCK_ROWS, HEAD_PAD]
    batch_rows = (start + tokens).to(tl.int64)  # [BLOCK_ROWS] rows of the flat batch

    q_offsets = batch_rows[:, None] * q_token_stride + heads[:, None] * q_head_stride + dims[None, :]
    q = tl.load(q_ptr + q_offsets, mask=mask, other=0.0)  # [BLOCK_ROWS, HEAD_PAD]
    # The new tokens are the last of the sequence: query i is at seq_len - q_len + i. No query of the tile may see keys
    # after its last query, so these are never read. Idle rows have later positions: they see keys, so no NaN arises.
    position = seq_len - q_len + tokens  # [BLOCK_ROWS]
    last_key = seq_len - q_len + tl.minimum(first + tokens_per_tile, q_len)
    out, _ = attend_tiles(
        q, position, 0, last_key, table_ptr + request.to(tl.int64) * table_stride,
        k_ptr + kv_head * HEAD_SIZE, v_ptr + kv_head * HEAD_SIZE, slot_stride, scale,
        BLOCK_SIZE, HEAD_SIZE, HEAD_PAD, BLOCK_ROWS, BLOCK_KV,
    )  # fmt: skip
    out_offsets = batch_rows[:, None] * out_token_stride + heads[:, None] * HEAD_SIZE + dims[None, :]
    tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def single_kernel(
    part_ptr: tl.tensor,  # [num_singles, num_heads, max_splits, HEAD_SIZE] fp32, contiguous
    lse_ptr: tl.tensor,  # [num_singles, num_heads, max_splits] fp32, contiguous
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,
    start_ptr: tl.tensor,
    lens_ptr: tl.tensor,
    singles_ptr: tl.tensor,  # [num_singles] requests with one new token
    scale: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    table_stride: tl.tensor,
    slot_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    SPLIT_KV: tl.constexpr,  # keys per program, a multiple of BLOCK_KV
) -> None:
    """Attends with the one query of a request over SPLIT_KV of its keys. Grid: (num_singles, num_kv_heads, max_splits).

    E.g. SPLIT_KV 256, a sequence of 600: programs 0, 1 and 2 take keys 0-255, 256-511 and 512-599. The other programs,
    which exist because another request of the batch is longer, return at once. The rows of a tile are the GROUP heads,
    padded to the 16 rows that a matrix unit needs.
    """
    single, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request = tl.load(singles_ptr + single)
    seq_len = tl.load(lens_ptr + request)
    first_key = split * SPLIT_KV
    if first_key < seq_len:
        rows = tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
        heads = kv_head * GROUP + rows  # [BLOCK_ROWS]
        dims = tl.arange(0, HEAD_PAD)  # [HEAD_PAD]
        mask = (rows[:, None] < GROUP) & (dims[None, :] < HEAD_SIZE)  # [BLOCK_ROWS, HEAD_PAD]
        batch_row = tl.load(start_ptr + request).to(tl.int64)
        q_offsets = batch_row * q_token_stride + heads[:, None] * q_head_stride + dims[None, :]
        q = tl.load(q_ptr + q_offsets, mask=mask, other=0.0)  # [BLOCK_ROWS, HEAD_PAD]
        position = tl.full([BLOCK_ROWS], 0, tl.int32) + seq_len - 1  # [BLOCK_ROWS]: it is the last token, and sees all
        last_key = tl.minimum(first_key + SPLIT_KV, seq_len)
        out, lse = attend_tiles(
            q, position, first_key, last_key, table_ptr + request.to(tl.int64) * table_stride,
            k_ptr + kv_head * HEAD_SIZE, v_ptr + kv_head * HEAD_SIZE, slot_stride, scale,
            BLOCK_SIZE, HEAD_SIZE, HEAD_PAD, BLOCK_ROWS, BLOCK_KV,
        )  # fmt: skip
        num_heads, max_splits = tl.num_programs(1) * GROUP, tl.num_programs(2)
        parts = (single.to(tl.int64) * num_heads + heads) * max_splits + split  # [BLOCK_ROWS]
        tl.store(part_ptr + parts[:, None] * HEAD_SIZE + dims[None, :], out, mask=mask)
        tl.store(lse_ptr + parts, lse, mask=rows < GROUP)


@triton.jit
def merge_kernel(
    out_ptr: tl.tensor,
    part_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    start_ptr: tl.tensor,
    lens_ptr: tl.tensor,
    singles_ptr: tl.tensor,
    out_token_stride: tl.tensor,
    max_splits: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    SPLIT_KV: tl.constexpr,
) -> None:
    """Merges the parts of one query and head. Grid: (num_singles, num_heads).

    This is the correction of the online softmax once more: part i holds the share exp(lse_i) of all the weight.
    Subtracting the largest lse seen so far keeps the numbers small.
    """
    single, head, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    request = tl.load(singles_ptr + single)
    num_splits = tl.cdiv(tl.load(lens_ptr + request), SPLIT_KV)
    dims = tl.arange(0, HEAD_PAD)  # [HEAD_PAD]
    mask = dims < HEAD_SIZE  # [HEAD_PAD]
    first = (single.to(tl.int64) * num_heads + head) * max_splits
    acc = tl.load(part_ptr + first * HEAD_SIZE + dims, mask=mask, other=0.0)  # [HEAD_PAD]
    largest = tl.load(lse_ptr + first)
    weight_sum = tl.exp(largest - largest)  # 1
    for split in range(1, num_splits):
        part = tl.load(part_ptr + (first + split) * HEAD_SIZE + dims, mask=mask, other=0.0)  # [HEAD_PAD]
        lse = tl.load(lse_ptr + first + split)
        new_largest = tl.maximum(largest, lse)
        correction, weight = tl.exp(largest - new_largest), tl.exp(lse - new_largest)
        acc = acc * correction + part * weight
        weight_sum = weight_sum * correction + weight
        largest = new_largest
    batch_row = tl.load(start_ptr + request).to(tl.int64)
    out_offsets = batch_row * out_token_stride + head * HEAD_SIZE + dims  # [HEAD_PAD]
    tl.store(out_ptr + out_offsets, (acc / weight_sum).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def write_kernel(
    key_ptr: tl.tensor,  # [num_tokens, ROW_SIZE], rows contiguous
    value_ptr: tl.tensor,
    k_ptr: tl.tensor,  # [num_slots, ROW_SIZE], contiguous
    v_ptr: tl.tensor,
    slot_mapping_ptr: tl.tensor,  # [num_tokens] int64
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    ROW_SIZE: tl.constexpr,  # num_kv_heads * head_size
    ROW_PAD: tl.constexpr,
) -> None:
    """Stores K and V of one new token in its slot. Grid: (num_tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    columns = tl.arange(0, ROW_PAD)  # [ROW_PAD]
    mask = columns < ROW_SIZE  # [ROW_PAD]
    tl.store(k_ptr + slot * ROW_SIZE + columns, tl.load(key_ptr + token * key_stride + columns, mask=mask), mask=mask)
    tl.store(
        v_ptr + slot * ROW_SIZE + columns, tl.load(value_ptr + token * value_stride + columns, mask=mask), mask=mask
    )
