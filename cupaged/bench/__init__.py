"""What measures: each figure beside the limit of the machine it was taken on, in the same run."""
