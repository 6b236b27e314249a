"""An example: the flights out of New York in 2013, published to Kafka day by day."""
