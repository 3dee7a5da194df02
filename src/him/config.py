"""Every default of the spec as a named constant with its unit; nothing here is computed."""

from typing import Final

from him.types import StreamSpec

FORMAT_VERSION: Final = 1
"""Of packs, records and traces."""
REPOSITORY_FORMAT: Final = 3
"""Of `him.json`: which log records there may be. 2 has those of garbage collection and retention, 3 those of keys."""
PLAIN_FORMAT: Final = 2
"""What a repository has that never encrypted anything."""
ENCRYPTED_TOGETHER: Final = (
    ("screen", "scene", "emb"),
    ("kv_cache", "kv_int8", "kv_fp8", "kv_fp16", "kv_records"),
)
"""Streams that say what others of them show: one is not encrypted without them."""

# Layout (spec §1.1, design §2)
PAGE_SIDE: Final = 8
"""Cells a page covers per side."""
LEVELS_PER_PAGE: Final = 3
"""Levels in a page's companion: 4×4, 2×2, 1×1."""
LEVEL_PIXELS_DIVISOR: Final = 3
"""A page's stored levels hold at most a third of the pixels of its present cells, and one tile more (spec §1.1)."""
LEVEL_THREADS: Final = 2
"""Threads that derive level tiles."""
LEVEL_AHEAD_BYTES: Final = 64 * 1024 * 1024
"""Of level tiles derived before they are used (but at least one)."""
LEVEL_NOTES_HELD: Final = 1_000
"""Names of derived tiles that are remembered in one batch."""
DIRECTORY_LEAF_RECORDS: Final = 64
DIRECTORY_FANOUT: Final = 16
PACK_ALIGN_BYTES: Final = 64
PAYLOAD_ALIGN_BYTES: Final = 4096
PAYLOAD_ALIGN_FROM_BYTES: Final = 64 * 1024
PACK_TARGET_BYTES: Final = 64 * 1024 * 1024
"""A warm pack is finished once it is larger than this."""
PACK_RANGES_MAX: Final = 1_000
"""… or once it has this many ranges: an unfinished pack costs a read a range when the addresses are learned anew."""
SYNC_AHEAD_BYTES: Final = 1024 * 1024
"""From this much unsynced on, what was appended is made durable before the log's lock is taken."""
CHECKPOINT_RECORDS: Final = 1_000
"""A checkpoint is written each time the log has grown by so many records (design §6)."""
CHECKPOINTS_KEPT: Final = 2
RAW_BELOW_RATIO: Final = 1.25
"""A payload that compresses less than this is stored raw (design §6)."""
COMPRESSION_SAMPLE_BYTES: Final = 64 * 1024
ZSTD_LEVEL: Final = 1
PAGE_CACHE_BYTES: Final = 256 * 1024 * 1024
"""Verified private copies of pages and directory nodes that a process keeps."""
ADDRESS_TAIL_ROWS: Final = 50_000
ADDRESS_KEPT_ROWS: Final = 2_000
"""A tail longer than this is kept when a repository is closed, or had to be learnt when it was opened."""
ADDRESS_MERGE_RATIO: Final = 4
"""A segment at most so many times as large as the next is merged with it."""
OPEN_PACKS_MAX: Final = 256
"""Packs a process keeps open: a quarter of the files that systems usually allow."""
READ_THREADS_MAX: Final = 4
BUFFER_FROM_BYTES: Final = 1024 * 1024
"""Records from this size on are read into buffers that are used again: fresh memory costs a fault a page."""
BUFFER_GRAIN_BYTES: Final = 64 * 1024
"""Buffers are multiples of this; smaller values are not worth one."""
BUFFERS_KEPT_BYTES: Final = 256 * 1024 * 1024

# Parity and care (design §6, docs/design/012-parity.md)
PARITY_DATA: Final = 10
"""Packs of a full group."""
PARITY_EXTRA: Final = 4
"""Parity files of a full group: so many of all its files may be lost."""
PARITY_CHUNK_BYTES: Final = 1024 * 1024
"""What is damaged and made again at once; a multiple of an extent."""
PARITY_FILES_MAX: Final = 64
"""Packs and parity files of a group together."""
PARITY_TABLE_BYTES_MAX: Final = 16 * 1024 * 1024
CARE_JOURNAL_BYTES_MAX: Final = 1024 * 1024
CARE_EVENTS_KEPT: Final = 1_000
"""Healings that a shortened journal keeps."""

# Tiers (spec §1.3, §7, design §6, §9, docs/design/008-tiers.md)
EXTENT_BYTES: Final = 256 * 1024
"""What is fetched from the cold tier and freed at once."""
MENDS_MAX: Final = 8
"""Times that what does not verify is put right and read again: other processes may free meanwhile what is read."""
WARM_FREE_RATIO: Final = 0.10
"""Of the warm budget kept free for what is written: fetching never fills it."""
WARM_BUDGET_BYTES_LEAST: Final = 16 * 1024 * 1024
RESTORE_BUDGET_BYTES: Final = 20 * 1024 * 1024 * 1024
"""The warm budget of a repository restored from its cold tier, where none is given."""
WARM_PACK_RATIO: Final = 1 / 16
"""A pack that is written to takes at most this part of the budget (and one commit more)."""
PIN_MINUTES: Final = 30.0
COLLECT_DEAD_SHARE: Final = 0.5
"""From which share of bytes that nothing refers to on a pack is given up, what is used being copied."""
COLLECT_COPY_BYTES: Final = 32 * 1024 * 1024
"""Copied at once when a pack is given up."""
COLD_PACK_BYTES_LEAST: Final = 128 * 1024 * 1024
COLD_PACK_BYTES: Final = 256 * 1024 * 1024
"""Compaction joins packs below the first to ones of about the second (spec §1.3: 128–512 MB)."""
COLD_FLIGHT_MAX: Final = 16
"""Ranged GETs a process keeps in flight to one bucket."""
COLD_PART_BYTES: Final = 8 * 1024 * 1024
"""Of a part of an upload; S3 allows 10,000 of at least 5 MiB."""
COLD_GAP_BYTES: Final = 1024 * 1024
"""A gap up to this size is fetched with what lies on both sides of it: 20 ms at 50 MB/s, as S3 serves one request."""
COLD_PARTS_FLIGHT_MAX: Final = 4
"""Parts of one upload in flight: with the one being gathered, what an upload holds in memory."""
COLD_RETRIES_MAX: Final = 8
"""Where 30 % of the requests fail, one in 50,000 runs out of them."""
COLD_BACKOFF_FIRST_MS: Final = 50
COLD_BACKOFF_MAX_MS: Final = 2_000
COLD_BACKOFF_BASE: Final = 3
"""A wait is drawn between the first one and so many times the one before."""
COLD_RETRY_SECONDS: Final = 20
"""After this long a request is not tried again."""
COLD_CONNECT_SECONDS: Final = 5
COLD_REQUEST_SECONDS: Final = 30
"""For one try with its body, both ways: a part of an upload then needs 2.2 Mbit/s."""
OBJECT_NAME_CHARS_MAX: Final = 512

# Deltas (spec §9)
DELTA_DEPTH_MAX: Final = 4
DELTA_FLATTEN_RATIO: Final = 0.30
DELTA_FROM_BYTES: Final = 1024
"""Tiles that take less than this in full are stored so."""
PARTS_DEPTH_MAX: Final = 8
"""Chunks that are deltas of documents in chunks, and so on: deeper is no honest repository."""
DELTA_BLOCK_CELLS: Final = 16
"""Side of a block in cells."""
DELTA_TIE_RATIO: Final = 1.05
"""Of encodings this close to the smallest, the one that decodes fastest is taken."""
DELTA_FEW_BLOCKS_RATIO: Final = 1 / 16
"""Up to this share of changed blocks their bytes are unpacked in less time than the base takes to copy."""
DELTA_FEW_BYTES: Final = 1024
"""So few changed blocks in no more stored bytes than this: no other encoding is tried."""
DELTA_LONG_BASE_BYTES: Final = 4 * 1024 * 1024
"""Above this a patch finds its matches by long-distance matching, and is only tried where a sample of cells moved."""
DELTA_TINY_BYTES: Final = 4096
"""Changes that fit in this together stay one delta on the root of their chain."""
CHUNK_BYTES_MIN: Final = 2 * 1024
CHUNK_BYTES_AVERAGE: Final = 8 * 1024
CHUNK_BYTES_MAX: Final = 64 * 1024
CHUNKS_FROM_BYTES: Final = 64 * 1024
"""From this size a document in chunks is smaller from its second version on (docs/design/004-deltas.md)."""
CLIENT_DELTA_BYTES_MAX: Final = 80 * 1024 * 1024
"""What DELTA_FLATTEN_RATIO leaves of TILE_BYTES_MAX, rounded up."""

# What goes first when the warm tier is full (spec §9, design §9, docs/design/008-tiers.md)
EVICT_SMALL_DIVISOR: Final = 10
"""The small queue's share of what is here and not pinned: one in so many."""
EVICT_FREQUENCY_MAX: Final = 2
"""Rounds in main that touches are worth: 3, as published, gains .002 of Belady's hits at Zipf 1.0 and loses .02 of
LRU's where the working set shifts (cache 10 %)."""
EVICT_PROMOTE_FROM: Final = 1
"""Touches in the small queue, after the one that admitted, from which on an extent goes to main."""
TOUCH_GRAIN_NS: Final = 1_000_000_000
"""Touches of one extent in the same second are one: an extent holds many records."""
PIN_TOUCHES: Final = 30
"""N: an extent touched more often than this within the window is pinned (one a second counts)."""
PIN_WINDOW_MINUTES: Final = 10
PIN_FOR_NS: Final = 30 * 60 * 1_000_000_000
PIN_STRETCH: Final = 2
"""Pins that are made while the cold tier does not answer last so many times longer."""
PIN_AGAIN_NS: Final = 5 * 60 * 1_000_000_000
"""What is read from a critical snapshot is pinned again once its pin is older than this."""
KEPT_BLOBS_MAX: Final = 100_000
PINS_BYTES_MAX: Final = 4 * 1024 * 1024
COLD_FAULT_NS: Final = 30 * 1_000_000_000
"""So long after the cold tier last failed to answer nothing is fetched ahead, and pins are made for twice as long."""
HOTNESS_KEYS_MAX: Final = 1_000_000
"""Extents (and ghosts) whose hotness is saved: those of 256 GiB."""
HOTNESS_BYTES_MAX: Final = 64 * 1024 * 1024

# Transfers between repositories (docs/design/010-transfer.md)
TRANSFER_BATCH_BYTES: Final = 8 * 1024 * 1024
"""Of records that are read, appended and committed together: half of the least warm budget."""
TRANSFER_BATCH_RECORDS: Final = 20_000
TRANSFER_TWINS_MAX: Final = 4
"""Directories of the target that a directory is compared with at once."""

# Limits on what comes from outside
TILE_BYTES_MAX: Final = 256 * 1024 * 1024
IMAGE_PIXELS_MAX: Final = 160 * 1024 * 1024
"""Of a picture that is read for what it shows, in memory; below what Pillow itself refuses (179 million)."""
IMAGE_FILE_BYTES_MAX: Final = 512 * 1024 * 1024
IMAGE_SIDE_MAX: Final = 64 * 1024
"""Rows or columns of a picture that is stored band by band."""
IMAGE_BAND_BYTES: Final = 32 * 1024 * 1024
"""Pixels decoded at once of such a picture, at four bytes each."""
IMAGE_META_BYTES_MAX: Final = 16 * 1024 * 1024
ARRAY_PART_BYTES: Final = 16 * 1024 * 1024
"""Of an array that is stored part by part: what is read at once (but at least one tile)."""
BATCHES_AHEAD: Final = 2
"""Batches of tiles that are worked on while the one before them is written."""
META_BYTES_MAX: Final = 1024 * 1024
LOG_RECORD_BYTES_MAX: Final = 64 * 1024 * 1024
CHECKPOINT_BYTES_MAX: Final = 1024 * 1024 * 1024
TREE_NODES_MAX: Final = 50_000
TREE_BYTES_MAX: Final = 64 * 1024 * 1024
GOAL_CHARS_MAX: Final = 1_000
ROWS_PER_APPEND_MAX: Final = 100_000
FOLDER_PICTURES_MAX: Final = 1_000_000
DAEMON_REQUEST_BYTES_MAX: Final = 1024 * 1024
FRAME_CELLS_MAX: Final = 2**31
"""Rows or columns of tiles in a frame."""

# KV caches
KV_TOKENS_MAX: Final = 2**24
"""Tokens of one cache: its record holds four bytes for each."""
KV_BINDING_CHARS_MAX: Final = 1_000
"""Of each text in a binding."""
KV_ORDERS_KEPT: Final = 4
"""Directories whose caches a process keeps in order."""
KV_RECORDS_AT_ONCE: Final = 1_000
KV_FILE_BYTES_MAX: Final = 4 * 1024 * 1024 * 1024
"""Of a tensor that the command line reads."""

# Query (spec §0, §1.1, §9)
BUDGET_MS: Final = 150
TILES_MAX: Final = 8
"""K: tiles a plan reads."""
TILES_CAP: Final = 16
COARSE_TILES_MAX: Final = 3
RECALL_AT_10: Final = 0.98
ACCEPT_CONFIDENCE: Final = 0.95
REJECT_CONFIDENCE: Final = 0.50
"""Below this probability an answer is `absent` rather than `tentative`."""
CANDIDATES_MAX: Final = 50
ANSWER_CANDIDATES_MAX: Final = 10

# Perception
OCR_HALO_PX: Final = 16
SCREEN_TILE_PX: Final = 512
EMBEDDING_DIMS: Final = 384
EMBEDDING_SCALE: Final = 127
"""A unit vector's component v is stored as round(v × 127) clipped to ±127 (fixed scale: exact integer scores)."""

STREAMS: Final[dict[str, StreamSpec]] = {
    spec.name: spec
    for spec in (
        StreamSpec("screen", dtype="uint8", halo=OCR_HALO_PX, level_rule="mean", merge_unit="frame"),
        StreamSpec("scene", content="bytes", tile_height=1, tile_width=1, merge_unit="frame"),
        StreamSpec("emb", dtype="int8", merge_unit="frame"),
        StreamSpec("kv_cache", merge_unit="frame"),
        StreamSpec("skills", content="bytes", tile_height=1, tile_width=1),
        StreamSpec("logs", content="bytes", tile_height=1, tile_width=1, merge_policy="union", retention_days=30),
        StreamSpec("audit", content="bytes", tile_height=1, tile_width=1, merge_policy="union"),
    )
}
"""Streams every repository has (spec §1.1, §6 retention; design §6)."""
