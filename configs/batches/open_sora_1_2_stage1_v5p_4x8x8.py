"""Global batch sizes for v5p:4x8x8, found by `plan`. Computed, not measured on a device.

  python -m stdit_jax.plan --config configs/open_sora_1_2.py --topology v5p:4x8x8 --stage stage1 --search-batch-size \\
      --write-buckets configs/batches/open_sora_1_2_stage1_v5p_4x8x8.py

LARGEST fills the memory. EQUAL makes the steps of all buckets take about the same time. For 240p x 1, 256 x 1 and 144p x 1
the search counted the next batch, which the host prepares during the step. For the other buckets arithmetic shows that the
next batch fits. Later searches of these three buckets started with --bucket 240p:1:168960 --bucket 256:1:358400 --bucket
144p:1:473600. To use a table, keep the mesh of the configuration and write a stage:
  dict(name=..., steps=..., **EQUAL[name])
"""

LARGEST = {
  "stage1": {
    "data.buckets": (
      ("2048", 1, 0.1, 8704),
      ("1080p", 1, 0.1, 17664),
      ("1024", 1, 0.05, 33280),
      ("720p", 1, 0.05, 35840),
      ("480p", 1, 0.1, 81920),
      ("512", 1, 0.1, 128000),
      ("360p", 408, (0.15, 0.1), 1024),
      ("360p", 204, (0.15, 0.1), 2048),
      ("360p", 102, (0.15, 0.33), 4096),
      ("360p", 51, 0.15, 8448),
      ("360p", 1, 0.2, 135680),
      ("240p", 408, (0.4, 0.1), 2048),
      ("240p", 204, (0.4, 0.1), 4608),
      ("240p", 102, (0.4, 0.33), 7936),
      ("240p", 51, 0.4, 15872),
      ("240p", 1, 0.3, 168960),
      ("256", 408, (0.5, 0.1), 4096),
      ("256", 204, (0.5, 0.1), 7936),
      ("256", 102, (0.5, 0.33), 15616),
      ("256", 51, 0.5, 30720),
      ("256", 1, 0.4, 358400),
      ("144p", 408, (1.0, 0.1), 6656),
      ("144p", 204, (1.0, 0.1), 12288),
      ("144p", 102, (1.0, 0.33), 22272),
      ("144p", 51, 1.0, 48640),
      ("144p", 1, 1.0, 473600),
    ),
    "data.reference_devices": 1,
    "max_tokens_per_device": 0,
    "split_tokens": "never",
  },
}

EQUAL = {
  "stage1": {
    "data.buckets": (
      ("2048", 1, 0.1, 1024),
      ("1080p", 1, 0.1, 2560),
      ("1024", 1, 0.05, 5888),
      ("720p", 1, 0.05, 6656),
      ("480p", 1, 0.1, 16384),
      ("512", 1, 0.1, 25600),
      ("360p", 408, (0.15, 0.1), 256),
      ("360p", 204, (0.15, 0.1), 512),
      ("360p", 102, (0.15, 0.33), 1024),
      ("360p", 51, 0.15, 2048),
      ("360p", 1, 0.2, 28160),
      ("240p", 408, (0.4, 0.1), 512),
      ("240p", 204, (0.4, 0.1), 1280),
      ("240p", 102, (0.4, 0.33), 2304),
      ("240p", 51, 0.4, 4608),
      ("240p", 1, 0.3, 61440),
      ("256", 408, (0.5, 0.1), 1024),
      ("256", 204, (0.5, 0.1), 2048),
      ("256", 102, (0.5, 0.33), 3840),
      ("256", 51, 0.5, 7680),
      ("256", 1, 0.4, 97280),
      ("144p", 408, (1.0, 0.1), 1536),
      ("144p", 204, (1.0, 0.1), 3328),
      ("144p", 102, (1.0, 0.33), 6656),
      ("144p", 51, 1.0, 13056),
      ("144p", 1, 1.0, 153600),
    ),
    "data.reference_devices": 1,
    "max_tokens_per_device": 0,
    "split_tokens": "never",
  },
}
