"""Fine-tuning on images (extra `finetune`)."""
