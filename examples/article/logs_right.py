"""One line on the console for the whole job, and every rank's own account in RUN_DIR/logs.

logs_right.py RUN_DIR
"""

import sys

import rankwise

log = rankwise.get_logger("train")

with rankwise.init(sys.argv[1]) as session:
    log.info("building the model on local rank %d", session.identity.local_rank)  # shown by rank 0, kept by all
    log.info("step 100: loss 0.250", ranks="main")  # made by rank 0 alone
    log.info("the last rank can speak too", ranks=[session.identity.world_size - 1])
