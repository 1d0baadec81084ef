"""What flows from the rollout workers to the learner: Arrow batches and the bounded queue's bookkeeping."""
