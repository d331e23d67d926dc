"""Text: hypotheses to records, records to summaries, caption file formats."""
