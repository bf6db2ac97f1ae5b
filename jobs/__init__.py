"""Entry points that Ray jobs run; thin, the work is in ``raysp``."""
