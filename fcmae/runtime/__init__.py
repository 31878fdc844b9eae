"""The training runtime shared by pretraining and fine-tuning; knows neither model nor data."""
