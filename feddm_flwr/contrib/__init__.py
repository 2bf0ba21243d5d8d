"""Extensions: a run names one of this folder's as `feddm_flwr.contrib.MODULE:NAME`, see docs/extending.md."""
