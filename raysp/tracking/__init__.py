"""What happened in a run: events, the console, MLflow. Importing this loads no heavy library."""
